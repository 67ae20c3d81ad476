"""What `import megatron_adamba` offers: the same work as the commands, as calls. Errors name arguments, not flags."""
