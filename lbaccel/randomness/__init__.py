"""Every random draw as a function of the sample and the update."""
