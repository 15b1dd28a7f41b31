"""Trained networks at work: views of videos to probabilities and features, and the files that hold them."""
