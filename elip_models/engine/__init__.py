"""How a model's forward changes: install, replaced block, forward pass, `encode_image`."""
