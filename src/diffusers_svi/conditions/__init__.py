"""What a film follows beside its text: a voice, or a skeleton that dances."""
