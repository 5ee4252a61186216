"""Containers that are registered by their labels: what watches Docker is a client of the registration API.

Pure are labels (what they say), containers (what is wanted of one), events and watch (what is wanted now);
engine speaks to Docker, keepers to the registration API, and docker is who runs them.
"""
