"""Finding out what a step would take under each scheme, and the choice by it."""
