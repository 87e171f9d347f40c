"""Malformed input of nine kinds (`make fuzz`) and kill -9 at random moments (`make kills`)."""
