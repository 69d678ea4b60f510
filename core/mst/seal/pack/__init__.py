"""One signed archive of what a run did, for an auditor."""
