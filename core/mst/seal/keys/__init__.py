"""Keys of encrypted files: where they come from, and how they wrap a file's own key."""
