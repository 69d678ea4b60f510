"""What keeps data, models and words from leaving unseen, and proves it afterwards."""
