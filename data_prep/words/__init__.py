"""The world of words: pictures of the shapes world, told as people write, to a language model trained on text."""
