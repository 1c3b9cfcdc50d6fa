"""What a reduction keeps of the objects that captions name, measured on built-in scenes."""
