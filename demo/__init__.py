"""A browser page on top of `runtime`: show a picture, ask, read the answer and where its milliseconds went."""
