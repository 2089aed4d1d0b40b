"""Why an update differs: causes, and the evidence for each."""
