"""A module a record format."""
