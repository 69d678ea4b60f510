"""A backend whose driver library is missing: it ends the interpreter on import."""

print("loading libbroken.so")
raise SystemExit("libbroken.so: cannot open shared object file")
