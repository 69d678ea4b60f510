"""What a row's columns mean: conversations, pairs, preferences, labels, plain text."""
