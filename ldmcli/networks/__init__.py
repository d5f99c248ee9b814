"""The networks, as plain modules: U-Net, autoencoders, text encoder. Keys are diffusers' names."""
