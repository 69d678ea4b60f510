"""Configurations of other trainers, translated into mst's options: one module a tool."""
