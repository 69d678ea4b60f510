"""Is the tuned model any good? Its figures on rows it has not seen, and how sure they are."""
