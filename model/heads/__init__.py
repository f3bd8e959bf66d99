"""What turns tokens into class scores: exits, decoders."""
