"""Pretrained dual encoders as towers: what a method is injected into, frozen."""
