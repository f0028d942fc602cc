"""Who wrote the better text: verdicts and the judges that give them."""
