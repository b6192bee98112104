"""What runs did, side by side, as one HTML page and pictures."""
