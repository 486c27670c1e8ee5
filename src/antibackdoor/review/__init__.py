"""Going through the suspects of a run by hand: decisions that are kept, a page to make them on, the cleaned set."""
