"""Is the tuned model any good? Accuracy over a set of answers, beside a classical baseline."""
