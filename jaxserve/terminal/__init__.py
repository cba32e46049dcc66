"""What people do at a terminal, besides serving: talk to a server, measure one. Standard library and tqdm only."""
