"""Models that stay in memory, and the server and client by which the commands of one user share them."""
