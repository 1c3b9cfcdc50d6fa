"""What a reduction keeps, in pictures and shares."""
