"""The OpenAI API and HTTP as values. Every file here is pure."""
