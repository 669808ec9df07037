"""Rotary embedding of queries and keys, behind a norm of each head if there is one."""
