//! A linear layer with 6-bit weights from Rust.

mod flexq;

use flexq::{check, Buffer, Stream, ThreadPool, WeightDesc, F32};

/// A weight that is ready to be multiplied with.
struct Linear {
    desc: WeightDesc,
    packed: Buffer,
}

impl Linear {
    /// w: [n][k].
    fn quantize(stream: &Stream, w: &[f32], n: usize, k: usize) -> Result<Self, String> {
        assert_eq!(w.len(), n * k);
        let desc = WeightDesc::new(n as i64, k as i64);
        let (mut planes_bytes, mut scales_bytes, mut packed_bytes) = (0, 0, 0);
        check(unsafe { flexq::flexq_weight_size(&desc, &mut planes_bytes, &mut scales_bytes) })?;
        let (mut planes, mut scales) = (vec![0u8; planes_bytes], vec![0u16; scales_bytes / 2]);
        let vanished = std::ptr::null_mut();
        check(unsafe {
            let (planes, scales) = (planes.as_mut_ptr(), scales.as_mut_ptr());
            flexq::flexq_quantize_weight(stream, &desc, w.as_ptr().cast(), F32, k as i64, planes, scales, vanished)
        })?;
        check(unsafe { flexq::flexq_prepack_size(stream, &desc, &mut packed_bytes) })?;
        let mut packed = Buffer::new(packed_bytes);
        check(unsafe {
            let (planes, scales) = (planes.as_ptr(), scales.as_ptr());
            flexq::flexq_prepack(stream, &desc, planes, scales, packed.as_mut_ptr(), packed_bytes)
        })?;
        Ok(Self { desc, packed })
    }

    /// y[m][n] of x[m][k], activations in 8 bits.
    fn forward(&self, stream: &Stream, x: &[f32], m: usize) -> Result<Vec<f32>, String> {
        assert_eq!(x.len(), m * self.desc.k as usize);
        let mut y = vec![0f32; m * self.desc.n as usize];
        let mut bytes = 0;
        check(unsafe { flexq::flexq_linear_workspace_size(stream, &self.desc, 8, m as i64, &mut bytes) })?;
        let mut workspace = Buffer::new(bytes);
        check(unsafe {
            flexq::flexq_linear(
                stream, &self.desc, self.packed.as_ptr(), self.packed.len(), 8, m as i64,
                x.as_ptr().cast(), F32, self.desc.k, std::ptr::null(), F32,
                y.as_mut_ptr().cast(), F32, self.desc.n, workspace.as_mut_ptr(), bytes,
            )
        })?;
        Ok(y)
    }
}

fn main() -> Result<(), String> {
    let (m, n, k) = (3, 80, 640);
    let mut state = 1u32;
    let mut random = |_| {
        state = state.wrapping_mul(1664525).wrapping_add(1013904223);
        (state >> 8) as f32 / 8388608.0 - 1.0
    };
    let w: Vec<f32> = (0..n * k).map(&mut random).collect();
    let x: Vec<f32> = (0..m * k).map(&mut random).collect();

    let pool = ThreadPool::new(2)?;
    let stream = Stream::cpu(&pool);
    let y = Linear::quantize(&stream, &w, n, k)?.forward(&stream, &x, m)?;

    let (mut error, mut norm) = (0f64, 0f64);
    for i in 0..m {
        for j in 0..n {
            let exact: f64 = (0..k).map(|l| x[i * k + l] as f64 * w[j * k + l] as f64).sum();
            error += (y[i * n + j] as f64 - exact).powi(2);
            norm += exact * exact;
        }
    }
    println!("relative error {:.4}", (error / norm).sqrt());
    if error > 0.01 * norm {
        return Err("the result is too far off".into());
    }
    match Linear::quantize(&stream, &[f32::NAN; 128], 1, 128) {
        Err(message) => println!("refused: {message}"),
        Ok(_) => return Err("a weight of NaN was taken".into()),
    }
    Ok(())
}
