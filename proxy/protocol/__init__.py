"""The OpenAI API and HTTP as values. Everything here is pure."""
