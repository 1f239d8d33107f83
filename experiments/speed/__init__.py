"""Speed and memory against the release's way of doing the same, as ratios measured in one run."""
