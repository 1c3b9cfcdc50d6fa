"""What a reduction costs and gains."""
