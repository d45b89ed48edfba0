"""Which texts may be questions of BBH itself, told without holding any.

A procedural task can come upon a real question: there are only 2,122 expressions of eight tokens, and 250 are BBH's.
The sieve has 8,192 holes; the CRC-32 of each of BBH's 4,000 questions of the procedural tasks stops one, so no real
question ever passes. Two in five of the others are stopped with them, by chance and no matter what they say: the next
draw takes their place.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable

HOLES = 8192


def sieve_of(texts: Iterable[str]) -> bytes:
    """A sieve that stops these texts: bit i % 8 of byte i // 8 is set where one of them falls on hole i."""
    sieve = bytearray(HOLES // 8)
    for text in texts:
        hole = zlib.crc32(text.encode()) % HOLES
        sieve[hole // 8] |= 1 << hole % 8
    return bytes(sieve)


def may_be_real(text: str) -> bool:
    """True for every question of BBH's procedural tasks, and for two in five of all other texts."""
    hole = zlib.crc32(text.encode()) % HOLES
    return bool(SIEVE[hole // 8] >> hole % 8 & 1)


SIEVE = base64.b85decode(
    b"xDFH***jnW#MBa%W8K-S7u>)E#4uFQKxR?JCV+x4ZVbSLZg45pC8?qI4G(;JIyeRFD!BoeV~KJ_BO4-1V>U4mpad@^Ac%Ctq*N3L5)8!XQ`rls"
    b"*MP$Uu^>Se0JI3_m;jipCm`fNh50aUm2h(fs9b^pJkAF+ga#$?HC-f`Dk)T(1hksD02%<Oh@<fd0t;5%TC^O3v_cqy*g-UCRUm)}eg~yX1rSGS"
    b"UKtc4qyPd7B7|X#xiWzO$u?{%Q~`2u4Y2P3U0XGpGJse>&_F;&1S2Clz=#kqEvDQ+8pUKBAqk*h2}VYuNe&bmj4Am@eLFXV7IXg-Vr2*?1;rBs"
    b"fb|wlN(%)=04UA^(~a<NB@+-(5Ea18!d!-$51=XeY6pYn2%cp$FwrFx>M_9xj0uGSE0iigzCaBG;#gq-q97!%K?yPxMyiS!S^VRLaT4GzD2Lhy"
    b"&ybW+4U|Snp=2YB4NHku1p;v7e5@cy2wKp<S`dP^CuJ@)>CB%;vXx3hM>7IMQB6>3!)iDUitxFTR7wB<)&LsLjz%!yc>zWw0i->uID#Gtu&^fD"
    b"YbgvOiJ=666@sh~8q^(AN5hnIC<MeuLBI%U7!(8;dB>Esz<|8@s8tfq0BbWv6tY1Bo`ysT&4jonCnNxalMf?<0n7=Fe(;8>3I`}LML2>ANI4X+"
    b"C(ndgCMi%TWFfvXN+~74HE4kfJBumGzyTsRXbX$8!i%#8uQCFpiHI<d5s=cUU?jkT-I{m-Sr9QZZ&<n{qfHjf08|6~M28!S6c$=KFfFpn)YyQ4"
    b"7)6;lOom)U2t@(|TKGgK%w&-Yz{Al5u?s+P)hx~d;H8e};YtJ{h!F!O5}-$D6Cw%$D9{i@m4YfL1Vq9Z)SHvRNVV5bp;@!S$$~{hGBBx_bZDsd"
    b"IgBQfApjt`$x)#Nh*;%<nR!kKm_dM17ehZA^1y;ThgIYvA<eQJ1WDm|^>9$5BjDqO71#}xT<$jp!>09v3M6eQ4edhnQiqCH0v!%g28v|_C=fg}"
    b"Tr~pl;#f9}xxip>oM3#QoOsxfJg%8bN@5~Q5ELUH1dtS@DuNjX1qPT921X!JAO#Jwh7SZI`v4RKc~&9_MB?1zB$X_1flnX?faPL<Y5^zV4ZS2Z"
    b"!br4=GEGVkB!cH55VEo)&>$rm7;F4U2q7Ebnjsr-$tYmN0q9a&4oT4^gdG73$8O}%z;6Hn0<HnRT)rhjpOCwKBo+~pI9CI3DMx`ZcMC5v6nMoM"
    b"ikG~3g|i5bcqvgd5P$~2+rR+R{>5de@`+$5MT)U)FGMAY7>EH9g2VZ$NLWA!p-9A7g^EBR"
)
