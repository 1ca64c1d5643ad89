"""What the rounds of the schemes are made of."""
