"""`mst ui`: a page on this machine that shows runs live, and starts, stops and resumes them."""
