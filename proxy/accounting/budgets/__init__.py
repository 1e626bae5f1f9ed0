"""Spending limits a day and a month: reserved before a call, settled after it."""
