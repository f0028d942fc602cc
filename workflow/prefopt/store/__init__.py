"""What is kept: tables, files, and what they were made by."""
