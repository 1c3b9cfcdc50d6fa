"""Token reduction of a pretrained vision transformer on photographs."""
