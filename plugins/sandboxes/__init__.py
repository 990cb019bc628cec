"""Sandboxes: where commands of an agent run. A task names one of them:

bubblewrap             this machine's /usr, read-only (the default)
docker:IMAGE           a container of an image that is on this machine
podman:IMAGE           likewise
"""
