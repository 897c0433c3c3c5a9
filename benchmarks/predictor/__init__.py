"""How good are predictions of the next layers' experts?"""
