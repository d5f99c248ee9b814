"""From files on disk to modules: validate, detect, map keys, build on the meta device, load strictly."""
