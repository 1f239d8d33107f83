"""The shapes world: an offline closed world of coloured shapes and letters, with an exact answer to every question."""
