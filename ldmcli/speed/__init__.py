"""How modules are made fast and small: device and number type, threads, start, offload."""
