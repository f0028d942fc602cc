"""From raw records to tables."""
