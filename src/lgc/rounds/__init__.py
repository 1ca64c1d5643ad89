"""Parts that the schemes' rounds are made of."""
