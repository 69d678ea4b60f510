"""The air-gap kit: everything that a machine without a network needs, made on one that has one."""
