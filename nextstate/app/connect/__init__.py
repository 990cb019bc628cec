"""`nextstate connect`: an agent's own settings name the proxy as its model's server."""
