"""What `ldm bench` measures: clocks, peers, and the floor under them."""
