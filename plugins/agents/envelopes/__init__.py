"""What known agents write around a person's words, and what they write themselves."""
