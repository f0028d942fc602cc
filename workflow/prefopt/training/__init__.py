"""One loop, and one short module per trainer."""
