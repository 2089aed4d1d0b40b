"""Runs and studies as one page: an HTML file that needs no network."""
