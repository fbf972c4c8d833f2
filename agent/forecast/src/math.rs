//! Arithmetic that is the same on every machine: no call into the platform's libm where it would matter for speed or for
//! equality of two runs.

/// `exp` by a polynomial on bits, within 2e-5 of the real one, relative; the compiler vectorises loops over it.
/// The argument is cut to ±83, so the result is positive and finite.
pub(crate) fn exp(x: f32) -> f32 {
    /// Added to a small number, leaves it rounded to a whole one in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-83.0, 83.0) * std::f32::consts::LOG2_E;
    let whole = x + ROUND;
    let f = x - (whole - ROUND);
    let p = 1.0
        + f * (std::f32::consts::LN_2
            + f * (0.240_226_5 + f * (0.055_504_1 + f * (0.009_618_1 + f * 0.001_333_4))));
    f32::from_bits(p.to_bits().wrapping_add(whole.to_bits() << 23))
}

/// `ln` of a positive normal number by its exponent and a series, within 2e-6 absolute or relative.
pub(crate) fn ln(x: f32) -> f32 {
    // The mantissa comes to lie in sqrt(1/2)..sqrt(2).
    let shifted = x.to_bits().wrapping_sub(0x3f35_04f3) as i32;
    let exponent = (shifted >> 23) as f32;
    let m = f32::from_bits((shifted & 0x007f_ffff) as u32 + 0x3f35_04f3);
    let s = (m - 1.0) / (m + 1.0);
    let t = s * s;
    2.0 * s * (1.0 + t * (0.333_333_3 + t * (0.2 + t * 0.142_857_1))) + exponent * std::f32::consts::LN_2
}

/// The inverse hyperbolic sine, for magnitudes below 1e18.
pub(crate) fn asinh(x: f32) -> f32 {
    let a = x.abs();
    ln(a + (a * a + 1.0).sqrt()).copysign(x)
}

/// The hyperbolic sine, for magnitudes below 80.
pub(crate) fn sinh(x: f32) -> f32 {
    let e = exp(x.abs());
    (0.5 * (e - 1.0 / e)).copysign(x)
}

/// Sums in eight lanes: an order that the compiler may vectorise.
pub(crate) fn sum(values: impl Iterator<Item = [f32; 8]>) -> f32 {
    let lanes = values.fold([0.0_f32; 8], |mut lanes, v| {
        for (l, v) in lanes.iter_mut().zip(v) {
            *l += v;
        }
        lanes
    });
    lanes.iter().sum()
}

/// The logistic function.
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The hyperbolic tangent.
pub(crate) fn tanh(x: f32) -> f32 {
    2.0 * sigmoid(2.0 * x) - 1.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_and_bounded() {
        for i in -8300..=8300 {
            let x = i as f32 / 100.0;
            let real = f64::from(x).exp();
            assert!((f64::from(exp(x)) / real - 1.0).abs() < 2e-5, "{x}: {} {real}", exp(x));
        }
        for x in [1e-6_f32, 1e-3, 0.1, 0.7, 1.0, 3.0, 50.0, 1e6, 1e15] {
            assert!((asinh(-x) + x.asinh()).abs() < 1e-5 * (1.0 + x.asinh()), "{x}");
        }
        assert!((sinh(-2.0) + 2.0_f32.sinh()).abs() < 1e-3);
        assert!(exp(-1e30) > 0.0 && exp(1e30).is_finite());
        assert!((tanh(0.5) - 0.5_f32.tanh()).abs() < 1e-5);
    }
}
